//! What the content of a file says of its type.
//!
//! Only types whose content gives them away are known here, each by as many fixed bytes as its format has: a guard that
//! looks at three of a picture's bytes lets a script pass that begins with them. Not known are types that run scripts where a
//! browser shows them (HTML, SVG, XML): no content makes them harmless.

/// Bytes of a content that tell its type.
pub(crate) const HEAD: usize = 128;

/// A type that a part may have.
#[derive(Debug)]
pub(crate) struct MediaType {
    /// Essence, in lower case.
    pub(crate) name: &'static str,
    /// Extensions of such files, without the dot; empty: any.
    pub(crate) extensions: &'static [&'static str],
    pub(crate) content: Content,
}

/// How a content is held against its type.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Content {
    /// The type says nothing of it.
    Any,
    /// UTF-8 without control characters but tabs and line ends.
    Text,
    /// RFC 8259.
    Json,
    /// By its first [`HEAD`] bytes, or all if it is shorter.
    Head(fn(&[u8]) -> bool),
}

/// The type of this name, whatever its letters' case.
pub(crate) fn media_type(name: &str) -> Option<&'static MediaType> {
    TYPES.iter().find(|known| known.name.eq_ignore_ascii_case(name))
}

/// All that are known, for messages.
pub(crate) fn known_types() -> Vec<&'static str> {
    TYPES.iter().map(|known| known.name).collect()
}

const fn of(name: &'static str, extensions: &'static [&'static str], content: Content) -> MediaType {
    MediaType { name, extensions, content }
}

#[rustfmt::skip]
static TYPES: &[MediaType] = &[
    of("image/png",        &["png"],                 Content::Head(png)),
    of("image/jpeg",       &["jpg", "jpeg", "jfif"], Content::Head(jpeg)),
    of("image/gif",        &["gif"],                 Content::Head(|head| starts(head, b"GIF87a") || starts(head, b"GIF89a"))),
    of("image/webp",       &["webp"],                Content::Head(webp)),
    of("image/avif",       &["avif"],                Content::Head(|head| is_box(head, AVIF))),
    of("image/heic",       &["heic"],                Content::Head(|head| is_box(head, HEIC))),
    of("image/heif",       &["heif", "heic"],        Content::Head(|head| is_box(head, HEIF))),
    of("image/tiff",       &["tif", "tiff"],         Content::Head(|head| starts(head, b"II*\0") || starts(head, b"MM\0*"))),
    of("image/bmp",        &["bmp"],                 Content::Head(|head| starts(head, b"BM") && at(head, 6, &[0; 4]))),
    of("audio/mpeg",       &["mp3"],                 Content::Head(mp3)),
    of("audio/aac",        &["aac"],                 Content::Head(|head| is_sync(head) && head.len() > 6 && head.get(1).is_some_and(|byte| byte & 0x06 == 0))),
    of("audio/ogg",        &["ogg", "oga", "opus"],  Content::Head(|head| starts(head, b"OggS\0"))),
    of("audio/wav",        &["wav"],                 Content::Head(|head| starts(head, b"RIFF") && at(head, 8, b"WAVEfmt "))),
    of("audio/flac",       &["flac"],                Content::Head(|head| starts(head, b"fLaC\0\0\0\x22"))),
    of("audio/mp4",        &["m4a", "mp4"],          Content::Head(|head| is_box(head, MP4))),
    of("audio/webm",       &["webm", "weba"],        Content::Head(|head| ebml(head, b"webm"))),
    of("video/mp4",        &["mp4", "m4v"],          Content::Head(|head| is_box(head, MP4))),
    of("video/quicktime",  &["mov", "qt"],           Content::Head(|head| is_box(head, &[b"qt  "]))),
    of("video/webm",       &["webm"],                Content::Head(|head| ebml(head, b"webm"))),
    of("video/x-matroska", &["mkv"],                 Content::Head(|head| ebml(head, b"matroska"))),
    of("video/ogg",        &["ogv", "ogg"],          Content::Head(|head| starts(head, b"OggS\0"))),
    of("application/pdf",  &["pdf"],                 Content::Head(pdf)),
    of("application/zip",  &["zip"],                 Content::Head(|head| starts(head, b"PK\x03\x04") || starts(head, b"PK\x05\x06"))),
    of("application/gzip", &["gz", "tgz"],           Content::Head(|head| starts(head, b"\x1f\x8b\x08"))),
    of("application/x-7z-compressed", &["7z"],       Content::Head(|head| starts(head, b"7z\xbc\xaf\x27\x1c"))),
    of("application/vnd.openxmlformats-officedocument.wordprocessingml.document",   &["docx"], Content::Head(office)),
    of("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",         &["xlsx"], Content::Head(office)),
    of("application/vnd.openxmlformats-officedocument.presentationml.presentation", &["pptx"], Content::Head(office)),
    of("application/vnd.oasis.opendocument.text",         &["odt"], Content::Head(|head| open_document(head, b"text"))),
    of("application/vnd.oasis.opendocument.spreadsheet",  &["ods"], Content::Head(|head| open_document(head, b"spreadsheet"))),
    of("application/vnd.oasis.opendocument.presentation", &["odp"], Content::Head(|head| open_document(head, b"presentation"))),
    of("text/plain",       &["txt", "text", "log"],  Content::Text),
    of("text/csv",         &["csv"],                 Content::Text),
    of("text/markdown",    &["md", "markdown"],      Content::Text),
    of("text/calendar",    &["ics"],                 Content::Text),
    of("text/vcard",       &["vcf"],                 Content::Text),
    of("application/json", &["json"],                Content::Json),
    of("application/octet-stream", &[],              Content::Any),
];

/// Brands of ISO base media files (ISO/IEC 14496-12 §4.3).
const MP4: &[&[u8]] = &[
    b"isom", b"iso2", b"iso3", b"iso4", b"iso5", b"iso6", b"iso7", b"iso8", b"iso9", b"mp41", b"mp42",
    b"mp71", b"avc1", b"M4A ", b"M4B ", b"M4V ", b"M4VH", b"M4VP", b"dash", b"msdh", b"MSNV", b"mmp4",
    b"3gp4", b"3gp5", b"3gp6", b"3gp7", b"f4v ", b"hvc1", b"av01",
];
const AVIF: &[&[u8]] = &[b"avif", b"avis"];
const HEIC: &[&[u8]] = &[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"];
const HEIF: &[&[u8]] = &[b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"];

fn at(head: &[u8], place: usize, fixed: &[u8]) -> bool {
    head.get(place..).is_some_and(|rest| rest.starts_with(fixed))
}

fn starts(head: &[u8], fixed: &[u8]) -> bool {
    head.starts_with(fixed)
}

/// Signature and the first chunk, which has to be IHDR of 13 bytes (PNG §5.2, §5.6).
fn png(head: &[u8]) -> bool {
    starts(head, b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR")
}

/// SOI and another marker (ISO/IEC 10918-1 Annex B).
fn jpeg(head: &[u8]) -> bool {
    starts(head, b"\xff\xd8\xff") && head.get(3).is_some_and(|marker| (0xc0..=0xfe).contains(marker))
}

fn webp(head: &[u8]) -> bool {
    starts(head, b"RIFF") && [b"WEBPVP8 ", b"WEBPVP8L", b"WEBPVP8X"].into_iter().any(|form| at(head, 8, form))
}

fn pdf(head: &[u8]) -> bool {
    starts(head, b"%PDF-") && head.get(5).is_some_and(u8::is_ascii_digit) && head.get(6) == Some(&b'.')
}

/// An ID3v2 tag, or a frame of layer III.
fn mp3(head: &[u8]) -> bool {
    let tag = starts(head, b"ID3") && head.get(3).is_some_and(|version| (2..=4).contains(version));
    // Neither the bit rate 15 nor the sampling rate 3 exists.
    let frame = is_sync(head)
        && head.get(1).is_some_and(|byte| byte & 0x06 == 0x02)
        && head.get(2).is_some_and(|byte| byte & 0xf0 != 0xf0 && byte & 0x0c != 0x0c);
    tag || frame
}

fn is_sync(head: &[u8]) -> bool {
    head.first() == Some(&0xff) && head.get(1).is_some_and(|byte| byte & 0xf0 == 0xf0)
}

/// A `ftyp` box whose major brand is one of these; some writers name theirs among the compatible ones only.
fn is_box(head: &[u8], brands: &[&[u8]]) -> bool {
    let length = head.first_chunk::<4>().map_or(0, |length| u32::from_be_bytes(*length));
    let Ok(length) = usize::try_from(length) else { return false };
    if !at(head, 4, b"ftyp") || !(16..=1024).contains(&length) {
        return false;
    }
    let known = |brand: &[u8]| brands.contains(&brand);
    let major = head.get(8..12).is_some_and(known);
    let compatible = head.get(16..length.min(head.len())).unwrap_or_default();
    // A picture and a film share brands such as mif1 and iso8; the major brand counts where it is one that we know.
    let of_others =
        [MP4, AVIF, HEIC].into_iter().any(|family| head.get(8..12).is_some_and(|it| family.contains(&it)));
    major || (!of_others && compatible.chunks_exact(4).any(known))
}

/// An EBML header with this DocType (RFC 8794 §11.2.4).
fn ebml(head: &[u8], kind: &[u8]) -> bool {
    let wanted = [b"\x42\x82".as_slice(), &[0x80 | u8::try_from(kind.len()).unwrap_or(0x7f)], kind].concat();
    starts(head, b"\x1a\x45\xdf\xa3") && head.windows(wanted.len()).any(|part| part == wanted)
}

/// A package (ECMA-376 Part 2): a ZIP file that begins with one of its own parts.
fn office(head: &[u8]) -> bool {
    let first: [&[u8]; 6] = [b"[Content_Types].xml", b"_rels/", b"docProps/", b"word/", b"xl/", b"ppt/"];
    starts(head, b"PK\x03\x04") && first.into_iter().any(|name| at(head, 30, name))
}

/// A package whose first file says what it is, uncompressed (OpenDocument 1.3 Part 2 §3.3).
fn open_document(head: &[u8], kind: &[u8]) -> bool {
    let said = [b"mimetypeapplication/vnd.oasis.opendocument.".as_slice(), kind].concat();
    // Behind it stands the next file, and no more of the name: `text-template` is another type.
    starts(head, b"PK\x03\x04")
        && at(head, 8, b"\0\0")
        && at(head, 30, &said)
        && at(head, 30 + said.len(), b"PK")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beginnings of real files.
    const SAMPLES: &[(&str, &[u8])] = &[
        ("image/png", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x01"),
        ("image/jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF\0"),
        ("image/gif", b"GIF89a\x01\0\x01\0"),
        ("image/webp", b"RIFF\x24\0\0\0WEBPVP8 "),
        ("image/avif", b"\0\0\0\x20ftypavif\0\0\0\0avifmif1"),
        ("image/heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("image/tiff", b"II*\0\x08\0\0\0"),
        ("image/bmp", b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0"),
        ("audio/mpeg", b"ID3\x04\0\0\0\0\0\0"),
        ("audio/mpeg", b"\xff\xfb\x90\x64"),
        ("audio/aac", b"\xff\xf1\x50\x80\x02\x1f\xfc\x21"),
        ("audio/ogg", b"OggS\0\x02\0\0"),
        ("audio/wav", b"RIFF\x24\0\0\0WAVEfmt "),
        ("audio/flac", b"fLaC\0\0\0\x22"),
        ("audio/mp4", b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42"),
        ("audio/webm", b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm"),
        ("video/mp4", b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2"),
        ("video/quicktime", b"\0\0\0\x14ftypqt  \0\0\0\0qt  "),
        ("video/x-matroska", b"\x1a\x45\xdf\xa3\xa3\x42\x82\x88matroska"),
        ("application/pdf", b"%PDF-1.7\n"),
        ("application/zip", b"PK\x03\x04\x14\0\0\0\0\0"),
        ("application/gzip", b"\x1f\x8b\x08\0"),
        ("application/x-7z-compressed", b"7z\xbc\xaf\x27\x1c\0\x04"),
    ];

    fn is(name: &str, head: &[u8]) -> bool {
        match media_type(name).unwrap().content {
            Content::Head(check) => check(head),
            _ => panic!("{name} is not told by its head"),
        }
    }

    #[test]
    fn each_type_is_told_by_its_own_beginning_and_by_no_others() {
        for (name, head) in SAMPLES {
            assert!(is(name, head), "{name}");
            for other in TYPES.iter().filter(|other| other.name != *name) {
                if let Content::Head(check) = other.content {
                    // The same container, and nothing in its beginning says whether there are pictures or sounds in it.
                    let kin = |names: &[&str]| names.contains(name) && names.contains(&other.name);
                    let same = kin(&["audio/mp4", "video/mp4"])
                        || kin(&["audio/webm", "video/webm"])
                        || kin(&["audio/ogg", "video/ogg"])
                        || kin(&["image/heic", "image/heif"]);
                    assert_eq!(check(head), same, "{name} as {}", other.name);
                }
            }
            for cut in 0..3 {
                assert!(!is(name, &head[..cut]), "{name} of {cut} bytes");
            }
        }
    }

    #[test]
    fn a_few_bytes_of_a_type_do_not_make_one() {
        for (name, head) in [
            ("image/png", b"\x89PNG<?php system($_GET[0]); ?>".as_slice()),
            ("image/png", b"\x89PNG\r\n\x1a\n<script>"),
            ("image/gif", b"GIF<?php"),
            ("image/jpeg", b"\xff\xd8\xff<?php"),
            ("image/webp", b"RIFF\0\0\0\0WEBP<svg onload=a>"),
            ("image/webp", b"XXXX\0\0\0\0WEBPVP8 "),
            ("image/bmp", b"BM<script>"),
            ("application/pdf", b"%PDF-<script>"),
            ("audio/mpeg", b"ID3<script>"),
            ("video/mp4", b"\0\0\0\x20ftyp<scr"),
            ("video/mp4", b"\0\0\0\x20ftypheic\0\0\0\0isommp41"),
            ("image/heic", b"\0\0\0\x20ftypisom\0\0\0\0mif1heic"),
            ("video/webm", b"\x1a\x45\xdf\xa3webm"),
            ("application/zip", b"MZPK\x03\x04"),
        ] {
            assert!(!is(name, head), "{name} {head:?}");
        }
    }

    #[test]
    fn packages_say_what_they_are() {
        let zip = |method: u8, name: &str| {
            let mut head = b"PK\x03\x04\x14\0\0\0".to_vec();
            head.extend([method, 0]);
            head.resize(30, 0);
            head.extend(name.as_bytes());
            head
        };
        let word = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";
        assert!(is(word, &zip(8, "[Content_Types].xml")));
        assert!(!is(word, &zip(8, "evil.exe")));
        let text = "application/vnd.oasis.opendocument.text";
        assert!(is(text, &zip(0, &format!("mimetype{text}PK\x03\x04"))));
        assert!(!is(text, &zip(0, &format!("mimetype{text}-templatePK"))));
        assert!(!is(text, &zip(8, &format!("mimetype{text}PK"))));
        assert!(!is(text, &zip(0, "mimetypeapplication/vnd.oasis.opendocument.spreadsheetPK")));
    }

    #[test]
    fn types_are_found_whatever_their_case_and_stand_once() {
        assert_eq!(media_type("IMAGE/Png").unwrap().name, "image/png");
        for scripted in ["text/html", "image/svg+xml", "application/xml", "application/xhtml+xml"] {
            assert!(media_type(scripted).is_none(), "{scripted}");
        }
        for (index, one) in TYPES.iter().enumerate() {
            assert!(TYPES.iter().skip(index + 1).all(|other| other.name != one.name), "{}", one.name);
            assert_eq!(one.name, one.name.to_ascii_lowercase());
        }
    }
}
