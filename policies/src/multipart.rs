//! Forms with files, multipart/form-data (RFC 7578), in one strict reading while they flow.
//!
//! Backends read forms in many ways: which of two names counts, whether a line that ends in a bare LF is one, what stands
//! before the first boundary. What any of them might read differently is refused here, and so is all that RFC 7578 tells
//! senders not to send. A form that passes is the same to every reader:
//! - it begins with the boundary and ends with it, and nothing stands before, behind or between;
//! - the boundary occurs as a whole delimiter line and nowhere else, not even as the beginning of a line;
//! - a part has Content-Disposition, perhaps Content-Type, and fields that say what is so anyway, each once;
//! - parameters stand once, without escapes, and `filename*` says what `filename` says.
//!
//! Nothing is held but the fields of one part, within their bound, the first bytes of its content, and JSON.

use std::str;
use std::sync::Arc;

use crate::denial::{Denial, FormFault};
use crate::json::{self, Limits, Schema};
use crate::media::{self, Content, MediaType};

/// Longest boundary (RFC 2046 §5.1.1).
const MAX_BOUNDARY: usize = 70;

/// Longest name of a file, in bytes: what file systems take.
const MAX_FILE_NAME: usize = 255;

/// What a form may be.
#[derive(Debug)]
pub(crate) struct Form {
    /// Parts in all.
    pub(crate) max_parts: u32,
    /// Bytes of one part's header fields.
    pub(crate) max_head: u32,
    pub(crate) parts: Vec<PartRule>,
}

/// What a part of one name may be.
#[derive(Debug)]
pub(crate) struct PartRule {
    pub(crate) name: Arc<str>,
    /// How many there have to be, and how many there may be.
    pub(crate) count: (u32, u32),
    pub(crate) max_bytes: u64,
    /// Whether it has the name of a file; otherwise it must have none.
    pub(crate) file: bool,
    pub(crate) types: Vec<&'static MediaType>,
    /// Extensions that a file's name may have; `None` for those of its type.
    pub(crate) extensions: Option<Vec<String>>,
    /// Bounds of JSON.
    pub(crate) json: Limits,
    pub(crate) schema: Option<Schema>,
}

/// The boundary that a Content-Type names, if it is multipart/form-data and can be read in one way only.
///
/// # Errors
/// [`FormFault::Boundary`].
pub(crate) fn boundary(content_type: &str) -> Result<&str, FormFault> {
    let (essence, parameters) = content_type.split_once(';').ok_or(FormFault::Boundary)?;
    if !essence.trim_matches(BLANKS).eq_ignore_ascii_case("multipart/form-data") {
        return Err(FormFault::Boundary);
    }
    let mut found = None;
    let mut charset = false;
    let mut rest = parameters;
    loop {
        let (name, value, after) = parameter(rest).ok_or(FormFault::Boundary)?;
        // Characters of RFC 2046 §5.1.1 but the blank: some readers cut boundaries there.
        let of_boundary = |b: u8| b.is_ascii_alphanumeric() || b"'()+_,-./:=?".contains(&b);
        if name.eq_ignore_ascii_case("boundary") && found.is_none() {
            let fits = (1..=MAX_BOUNDARY).contains(&value.len()) && value.bytes().all(of_boundary);
            found = Some(value).filter(|_| fits);
            if !fits {
                return Err(FormFault::Boundary);
            }
        } else if name.eq_ignore_ascii_case("charset") && value.eq_ignore_ascii_case("utf-8") && !charset {
            charset = true;
        } else {
            return Err(FormFault::Boundary);
        }
        match after.strip_prefix(';') {
            Some(after) => rest = after,
            None if after.is_empty() => return found.ok_or(FormFault::Boundary),
            None => return Err(FormFault::Boundary),
        }
    }
}

const BLANKS: [char; 2] = [' ', '\t'];

/// Splits `name=value` off, blanks around it; the value is a token, or quoted without escapes.
fn parameter(text: &str) -> Option<(&str, &str, &str)> {
    let (name, rest) = text.trim_start_matches(BLANKS).split_once('=')?;
    if name.is_empty() || !name.bytes().all(is_token) {
        return None;
    }
    let (value, rest) = match rest.strip_prefix('"') {
        Some(quoted) => {
            // A quoted pair is read as one character, or as two.
            quoted.split_once('"').filter(|(value, _)| !value.contains('\\'))?
        }
        None => {
            let end = rest.find(|c: char| !(c.is_ascii() && is_token(c as u8))).unwrap_or(rest.len());
            rest.split_at_checked(end).filter(|(value, _)| !value.is_empty())?
        }
    };
    Some((name, value, rest.trim_start_matches(BLANKS)))
}

/// RFC 9110 §5.6.2.
fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// Judges one form while it flows. Made by [`RequestPermit::form_judge`](crate::RequestPermit::form_judge) only.
///
/// What [`FormJudge::take`] agreed with may go on: of a form that is refused later no reader ever sees the end.
#[derive(Debug)]
pub struct FormJudge {
    form: Arc<Form>,
    /// CR LF `--` boundary: what ends a part.
    delimiter: Matcher,
    /// The same without its line end, which may stand nowhere else.
    bare: Matcher,
    /// Matched bytes of the delimiter that came with data before.
    carried: usize,
    step: Step,
    head: Vec<u8>,
    counts: Vec<u32>,
    all: u32,
    part: Option<Part>,
    /// Once something was wrong, nothing is right any more.
    fault: Option<Denial>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// In a part's content, or before the first delimiter.
    Content,
    /// Behind a delimiter.
    Behind,
    BehindCr,
    BehindDash,
    /// In a part's fields.
    Head,
    /// Behind the last delimiter, and how many bytes of a line end came.
    End(u8),
}

impl FormJudge {
    pub(crate) fn new(form: Arc<Form>, boundary: &str) -> Self {
        let delimiter = [b"\r\n--", boundary.as_bytes()].concat();
        let bare = Matcher::new(delimiter.get(2..).unwrap_or_default());
        let mut delimiter = Matcher::new(&delimiter);
        // The first one stands at the very beginning, as if a line had ended.
        delimiter.matched = 2;
        Self {
            counts: vec![0; form.parts.len()],
            form,
            delimiter,
            bare,
            carried: 2,
            step: Step::Content,
            head: Vec::new(),
            all: 0,
            part: None,
            fault: None,
        }
    }

    /// Judges what came next.
    ///
    /// # Errors
    /// [`Denial::Form`]; [`Denial::Json`] and [`Denial::Schema`] for JSON in it.
    pub fn take(&mut self, data: &[u8]) -> Result<(), Denial> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        self.read(data).inspect_err(|fault| self.fault = Some(fault.clone()))
    }

    /// Judges that nothing comes any more.
    ///
    /// # Errors
    /// As [`FormJudge::take`].
    pub fn finish(&mut self) -> Result<(), Denial> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        if !matches!(self.step, Step::End(0 | 2)) {
            return Err(FormFault::End.into());
        }
        let missing = self.form.parts.iter().zip(&self.counts).find(|(rule, count)| **count < rule.count.0);
        match missing {
            Some((rule, _)) => Err(rule.denial(FormFault::Missing)),
            None => Ok(()),
        }
    }

    /// Parts so far.
    #[must_use]
    pub fn parts(&self) -> u32 {
        self.all
    }

    fn read(&mut self, data: &[u8]) -> Result<(), Denial> {
        let mut rest = data;
        while let [byte, after @ ..] = rest {
            match (self.step, byte) {
                (Step::Content, _) => {
                    rest = self.read_content(rest)?;
                    continue;
                }
                (Step::Behind, b'\r') => self.step = Step::BehindCr,
                (Step::Behind, b'-') => self.step = Step::BehindDash,
                (Step::BehindCr, b'\n') => {
                    self.head.clear();
                    self.step = Step::Head;
                }
                (Step::BehindDash, b'-') => self.step = Step::End(0),
                (Step::Behind | Step::BehindCr | Step::BehindDash, _) => {
                    return Err(FormFault::Delimiter.into());
                }
                (Step::Head, &byte) => self.read_head(byte)?,
                (Step::End(0), b'\r') => self.step = Step::End(1),
                (Step::End(1), b'\n') => self.step = Step::End(2),
                (Step::End(_), _) => return Err(FormFault::Behind.into()),
            }
            rest = after;
        }
        Ok(())
    }

    /// Reads up to the next delimiter; gives back what stands behind it.
    fn read_content<'d>(&mut self, data: &'d [u8]) -> Result<&'d [u8], Denial> {
        let mut at = 0;
        while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
            if self.delimiter.matched == 0 && self.bare.matched == 0 {
                // Nothing of a delimiter is at hand: on to where one may begin.
                match rest.iter().position(|byte| matches!(byte, b'\r' | b'-')) {
                    Some(skipped) => at += skipped,
                    None => break,
                }
            }
            let Some(&byte) = data.get(at) else { break };
            let before = self.delimiter.matched;
            let ends = self.delimiter.step(byte);
            let is_bare = self.bare.step(byte);
            at += 1;
            // What was taken for a delimiter, and came before this data, is content after all.
            let given = (before + 1).saturating_sub(self.delimiter.matched).min(self.carried);
            if given > 0 {
                let content = self.delimiter.pattern.get(..given).unwrap_or_default().to_vec();
                self.carried -= given;
                self.give(&content)?;
            }
            if ends {
                let own = self.delimiter.pattern.len().saturating_sub(self.carried);
                self.give(data.get(..at.saturating_sub(own)).unwrap_or_default())?;
                self.end_part()?;
                (self.delimiter.matched, self.bare.matched, self.carried) = (0, 0, 0);
                self.step = Step::Behind;
                return Ok(data.get(at..).unwrap_or_default());
            }
            if is_bare {
                self.give(data.get(..at.saturating_sub(1)).unwrap_or_default())?;
                return Err(FormFault::Delimiter.into());
            }
        }
        let own = self.delimiter.matched.saturating_sub(self.carried);
        self.give(data.get(..data.len().saturating_sub(own)).unwrap_or_default())?;
        self.carried = self.delimiter.matched;
        Ok(&[])
    }

    /// Takes a piece of the content of the part at hand.
    fn give(&mut self, content: &[u8]) -> Result<(), Denial> {
        if content.is_empty() {
            return Ok(());
        }
        let Some(part) = &mut self.part else { return Err(FormFault::Start.into()) };
        let rule = self.form.parts.get(part.rule).ok_or(FormFault::Unknown)?;
        part.size = part.size.saturating_add(content.len() as u64);
        if part.size > rule.max_bytes {
            return Err(rule.denial(FormFault::Size));
        }
        if part.content.take(content) { Ok(()) } else { Err(rule.denial(FormFault::Content)) }
    }

    fn end_part(&mut self) -> Result<(), Denial> {
        let Some(part) = self.part.take() else { return Ok(()) };
        let rule = self.form.parts.get(part.rule).ok_or(FormFault::Unknown)?;
        if part.declared.is_some_and(|declared| declared != part.size) {
            return Err(FormFault::Field.into());
        }
        match part.content {
            Checker::Json(text) => {
                let text = json::scan(&text, &rule.json)?;
                let Some(schema) = &rule.schema else { return Ok(()) };
                schema.check(text).map_err(|pointer| Denial::Schema { pointer })
            }
            other if !other.may_end() => Err(rule.denial(FormFault::Content)),
            _ => Ok(()),
        }
    }

    /// Gathers the fields of a part, up to the blank line.
    fn read_head(&mut self, byte: u8) -> Result<(), Denial> {
        self.head.push(byte);
        if self.head == b"\r\n" {
            return Err(FormFault::Disposition.into());
        }
        if let Some(fields) = self.head.strip_suffix(b"\r\n\r\n") {
            let fields = str::from_utf8(fields).map_err(|_| FormFault::Field)?;
            let part = begin_part(&self.form, fields, &self.bare.pattern)?;
            self.all = self.all.saturating_add(1);
            let (rule, count) = self
                .form
                .parts
                .get(part.rule)
                .zip(self.counts.get_mut(part.rule))
                .ok_or(FormFault::Unknown)?;
            *count = count.saturating_add(1);
            if *count > rule.count.1 || self.all > self.form.max_parts {
                return Err(rule.denial(FormFault::TooMany));
            }
            self.part = Some(part);
            self.step = Step::Content;
        } else if self.head.len() >= self.form.max_head as usize {
            return Err(FormFault::Head.into());
        }
        Ok(())
    }
}

impl PartRule {
    fn denial(&self, fault: FormFault) -> Denial {
        Denial::Form { fault, part: Some(Arc::clone(&self.name)) }
    }
}

impl From<FormFault> for Denial {
    fn from(fault: FormFault) -> Self {
        Self::Form { fault, part: None }
    }
}

/// A part whose content comes.
#[derive(Debug)]
struct Part {
    /// Index of its rule.
    rule: usize,
    size: u64,
    /// What its Content-Length says.
    declared: Option<u64>,
    content: Checker,
}

/// Reads the fields of a part, without the blank line.
fn begin_part(form: &Form, fields: &str, delimiter: &[u8]) -> Result<Part, Denial> {
    // Some readers look for it before they look for fields.
    if fields.as_bytes().windows(delimiter.len()).any(|part| part == delimiter) {
        return Err(FormFault::Delimiter.into());
    }
    let (mut disposition, mut kind, mut length, mut coding) = (None, None, None, None);
    for line in fields.split("\r\n") {
        let (name, value) = line.split_once(':').ok_or(FormFault::Field)?;
        // Folded lines begin with a blank; a blank before the colon hides a name from some readers. Bare line ends are controls.
        if !name.bytes().all(is_token) || value.chars().any(char::is_control) {
            return Err(FormFault::Field.into());
        }
        let place = match name.to_ascii_lowercase().as_str() {
            "content-disposition" => &mut disposition,
            "content-type" => &mut kind,
            // RFC 7578 §4.8 wants no others; these two are sent by some libraries.
            "content-length" => &mut length,
            "content-transfer-encoding" => &mut coding,
            _ => return Err(FormFault::Field.into()),
        };
        if place.replace(value.trim_matches(BLANKS)).is_some() {
            return Err(FormFault::Field.into());
        }
    }
    // A coding would hide the content (RFC 7578 §4.7).
    let is_plain = |coding: &str| ["binary", "8bit", "7bit"].iter().any(|it| coding.eq_ignore_ascii_case(it));
    if coding.is_some_and(|coding| !is_plain(coding)) {
        return Err(FormFault::Field.into());
    }
    let declared = length.map(|text| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u64>().ok().filter(|_| digits).ok_or(FormFault::Field)
    });
    let declared = declared.transpose()?;
    let (name, file) = read_disposition(disposition.ok_or(FormFault::Disposition)?)?;
    let (index, rule) =
        form.parts.iter().enumerate().find(|(_, rule)| *rule.name == *name).ok_or(FormFault::Unknown)?;
    if file.is_some() != rule.file {
        return Err(rule.denial(FormFault::FileName));
    }
    let claimed = match kind {
        Some(kind) => read_type(kind),
        // RFC 7578 §4.4. Of a file nothing is guessed.
        None if !rule.file => media::media_type("text/plain"),
        None => None,
    };
    let claimed = claimed
        .filter(|claimed| rule.types.iter().any(|allowed| allowed.name == claimed.name))
        .ok_or_else(|| rule.denial(FormFault::Type))?;
    if let Some(file) = file
        && !is_file_name(&file, rule, claimed)
    {
        return Err(rule.denial(FormFault::FileName));
    }
    Ok(Part { rule: index, size: 0, declared, content: Checker::new(claimed.content) })
}

/// Name of the field, and of the file if there is one (RFC 7578 §4.2).
fn read_disposition(value: &str) -> Result<(&str, Option<String>), FormFault> {
    const FAULT: FormFault = FormFault::Disposition;
    let (kind, mut rest) = value.split_once(';').ok_or(FAULT)?;
    if !kind.trim_matches(BLANKS).eq_ignore_ascii_case("form-data") {
        return Err(FAULT);
    }
    let (mut name, mut file, mut extended) = (None, None, None);
    loop {
        let (parameter, value, after) = parameter(rest).ok_or(FAULT)?;
        let place = match parameter.to_ascii_lowercase().as_str() {
            "name" => &mut name,
            "filename" => &mut file,
            "filename*" => &mut extended,
            _ => return Err(FAULT),
        };
        if place.replace(value).is_some() {
            return Err(FAULT);
        }
        match after.strip_prefix(';') {
            Some(after) => rest = after,
            None if after.is_empty() => break,
            None => return Err(FAULT),
        }
    }
    // Browsers write quotes and line ends of a name so (HTML §4.10.21.8), and some readers decode them.
    let file = file.map(|file| percent_decoded(file).ok_or(FormFault::FileName)).transpose()?;
    if let Some(extended) = extended {
        // Readers disagree which one counts; where they agree it does not matter.
        let said = extended.get(..7).filter(|it| it.eq_ignore_ascii_case("utf-8''")).and(extended.get(7..));
        let said = said.and_then(percent_decoded);
        if said.is_none() || said != file {
            return Err(FormFault::FileName);
        }
    }
    Ok((name.ok_or(FAULT)?, file))
}

/// A percent sign that begins no escape stands for itself; `None` if what comes out is not UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let digit = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        let escape = (*byte == b'%').then(|| digit(after.first()).zip(digit(after.get(1)))).flatten();
        match escape {
            Some((high, low)) => {
                decoded.push(u8::try_from(high * 16 + low).ok()?);
                rest = after.get(2..).unwrap_or_default();
            }
            None => decoded.push(*byte),
        }
    }
    String::from_utf8(decoded).ok()
}

/// Whether a file may have this name: one that says where it is, what it is not, or two things to two readers, may not.
fn is_file_name(name: &str, rule: &PartRule, claimed: &MediaType) -> bool {
    let forbidden = |c: char| {
        c.is_control()
            // Separators of paths, of streams within files (NTFS), and of parameters.
            || matches!(c, '/' | '\\' | ':' | ';' | '<' | '>' | '|' | '*' | '?')
            // Looks like a separator, or turns the direction of what follows, so that "gpj.exe" reads "exe.jpg".
            || matches!(c, '\u{2044}' | '\u{2215}' | '\u{29f8}' | '\u{ff0f}' | '\u{ff3c}' | '\u{fe68}')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
            || c == char::REPLACEMENT_CHARACTER
    };
    let outer = |c: char| c == '.' || c.is_whitespace();
    // Windows drops dots and blanks at the end; a dot at the beginning hides a file, or means a folder.
    if name.is_empty() || name.len() > MAX_FILE_NAME || name.contains(forbidden) || name.starts_with(outer) {
        return false;
    }
    if name.ends_with(outer) {
        return false;
    }
    let Some((_, extension)) = name.rsplit_once('.') else { return true };
    let is = |known: &str| known.eq_ignore_ascii_case(extension);
    match &rule.extensions {
        Some(list) => list.iter().any(|known| is(known)),
        None => claimed.extensions.is_empty() || claimed.extensions.iter().any(|known| is(known)),
    }
}

/// The type that a part claims to have.
fn read_type(value: &str) -> Option<&'static MediaType> {
    let (essence, parameters) = match value.split_once(';') {
        Some((essence, parameters)) => (essence, Some(parameters)),
        None => (value, None),
    };
    let claimed = media::media_type(essence.trim_matches(BLANKS))?;
    let Some(parameters) = parameters else { return Some(claimed) };
    let (name, value, after) = parameter(parameters)?;
    let fits = match claimed.content {
        // It is held against UTF-8, and must not be read as anything else.
        Content::Text | Content::Json => {
            name.eq_ignore_ascii_case("charset") && value.eq_ignore_ascii_case("utf-8")
        }
        // As recorders in browsers name it.
        Content::Head(_) => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_., ".contains(&b);
            name.eq_ignore_ascii_case("codecs") && value.len() <= 64 && value.bytes().all(plain)
        }
        Content::Any => false,
    };
    (fits && after.is_empty()).then_some(claimed)
}

/// Holds a content against its type.
#[derive(Debug)]
enum Checker {
    Any,
    Text(Utf8),
    Json(Vec<u8>),
    /// Its first bytes until there are enough of them.
    Head {
        head: Vec<u8>,
        check: fn(&[u8]) -> bool,
        told: bool,
    },
}

impl Checker {
    fn new(content: Content) -> Self {
        match content {
            Content::Any => Self::Any,
            Content::Text => Self::Text(Utf8::default()),
            Content::Json => Self::Json(Vec::new()),
            Content::Head(check) => Self::Head { head: Vec::with_capacity(media::HEAD), check, told: false },
        }
    }

    /// Whether it may go on like this.
    fn take(&mut self, content: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Text(text) => text.take(content),
            // INVARIANT: within the part's bound, which `compile` keeps small for JSON.
            Self::Json(text) => {
                text.extend_from_slice(content);
                true
            }
            Self::Head { told: true, .. } => true,
            Self::Head { head, check, told } => {
                let missing = media::HEAD.saturating_sub(head.len()).min(content.len());
                head.extend_from_slice(content.get(..missing).unwrap_or_default());
                if head.len() < media::HEAD {
                    return true;
                }
                *told = true;
                check(head)
            }
        }
    }

    /// Whether it may end here.
    fn may_end(&self) -> bool {
        match self {
            Self::Any | Self::Json(_) | Self::Head { told: true, .. } => true,
            Self::Text(text) => text.is_whole(),
            Self::Head { head, check, .. } => check(head),
        }
    }
}

/// Text that comes in pieces.
#[derive(Debug, Default)]
struct Utf8 {
    /// The beginning of a character whose rest is still to come.
    begun: Vec<u8>,
}

impl Utf8 {
    fn take(&mut self, mut content: &[u8]) -> bool {
        while !self.begun.is_empty() {
            let [byte, rest @ ..] = content else { return true };
            content = rest;
            self.begun.push(*byte);
            match str::from_utf8(&self.begun) {
                // Characters of several bytes that are controls: U+0080 to U+009F.
                Ok(text) if text.chars().any(char::is_control) => return false,
                Ok(_) => self.begun.clear(),
                Err(error) if error.error_len().is_some() => return false,
                Err(_) => {}
            }
        }
        let (text, begun) = match str::from_utf8(content) {
            Ok(text) => (text, &[][..]),
            Err(error) if error.error_len().is_some() => return false,
            Err(error) => {
                let (whole, begun) = content.split_at_checked(error.valid_up_to()).unwrap_or_default();
                (str::from_utf8(whole).unwrap_or("\0"), begun)
            }
        };
        self.begun.extend_from_slice(begun);
        !text.contains(|c: char| c.is_control() && !matches!(c, '\t' | '\r' | '\n'))
    }

    fn is_whole(&self) -> bool {
        self.begun.is_empty()
    }
}

/// Looks for a text in what comes, byte by byte (Knuth, Morris and Pratt).
#[derive(Debug)]
struct Matcher {
    pattern: Box<[u8]>,
    /// For each length that was matched: the longest shorter one that still holds.
    shorter: Box<[u8]>,
    matched: usize,
}

impl Matcher {
    fn new(pattern: &[u8]) -> Self {
        let mut matcher = Self { pattern: pattern.into(), shorter: Box::new([0]), matched: 0 };
        let mut shorter = vec![0, 0];
        for &byte in pattern.iter().skip(1) {
            matcher.shorter = shorter.as_slice().into();
            matcher.step(byte);
            shorter.push(u8::try_from(matcher.matched).unwrap_or_default());
        }
        Self { shorter: shorter.into(), matched: 0, ..matcher }
    }

    /// Whether the text ends with this byte.
    fn step(&mut self, byte: u8) -> bool {
        while self.pattern.get(self.matched) != Some(&byte) {
            if self.matched == 0 {
                return false;
            }
            self.matched = self.shorter.get(self.matched).copied().unwrap_or_default().into();
        }
        self.matched += 1;
        self.matched == self.pattern.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;
    use serde_json::Value;

    use super::*;

    fn rule(name: &str, file: bool, kind: &str) -> PartRule {
        PartRule {
            name: name.into(),
            count: (0, 3),
            max_bytes: 200,
            file,
            types: vec![media::media_type(kind).unwrap()],
            extensions: None,
            json: Limits::DEFAULT,
            schema: None,
        }
    }

    fn form() -> Arc<Form> {
        let parts = vec![
            rule("note", false, "text/plain"),
            rule("blob", true, "application/octet-stream"),
            rule("data", false, "application/json"),
            rule("paper", true, "application/pdf"),
        ];
        Arc::new(Form { max_parts: 4, max_head: 200, parts })
    }

    /// Judges a form that comes in these pieces.
    fn judged<'a>(boundary: &str, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<u32, Denial> {
        let mut judge = FormJudge::new(form(), boundary);
        for piece in pieces {
            judge.take(piece)?;
        }
        judge.finish().map(|()| judge.parts())
    }

    fn blob(boundary: &str, length: usize, content: &[u8]) -> Vec<u8> {
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"blob\"; filename=\"a\"\r\n\
             Content-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
        );
        [head.as_bytes(), content, format!("\r\n--{boundary}--\r\n").as_bytes()].concat()
    }

    #[test]
    fn boundaries() {
        for (good, named) in [
            ("multipart/form-data; boundary=abc", "abc"),
            ("Multipart/Form-Data;boundary=\"a:b/c=?\"", "a:b/c=?"),
            (
                "multipart/form-data ; charset=UTF-8 ; BOUNDARY=----WebKitFormBoundary7MA4YWxk",
                "----WebKitFormBoundary7MA4YWxk",
            ),
            ("multipart/form-data; boundary=abc ", "abc"),
        ] {
            assert_eq!(boundary(good), Ok(named), "{good}");
        }
        for bad in [
            "multipart/form-data",
            "multipart/form-data;",
            "multipart/form-data; boundary",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=a:b",
            "multipart/form-data; boundary=\"a b\"",
            "multipart/form-data; boundary=\"a\\b\"",
            "multipart/form-data; boundary=\"a",
            "multipart/form-data; boundary=a; boundary=a",
            "multipart/form-data; boundary=a;",
            "multipart/form-data; boundary=a b",
            "multipart/form-data; boundary=a; charset=utf-8; charset=utf-8",
            "multipart/form-data; charset=utf-8",
            "multipart/mixed; boundary=a",
            "multipart/form-data; boundary=ä",
            "",
        ] {
            assert_eq!(boundary(bad), Err(FormFault::Boundary), "{bad}");
        }
        assert!(boundary(&format!("multipart/form-data; boundary={}", "b".repeat(70))).is_ok());
        assert!(boundary(&format!("multipart/form-data; boundary={}", "b".repeat(71))).is_err());
    }

    #[test]
    fn after_a_fault_nothing_is_right() {
        let mut judge = FormJudge::new(form(), "b");
        let fault = judge.take(b"x").unwrap_err();
        assert_eq!(fault, FormFault::Start.into());
        assert_eq!(judge.take(b"--b--"), Err(fault.clone()));
        assert_eq!(judge.finish(), Err(fault));
    }

    #[test]
    fn memory_is_bounded_by_the_rule() {
        let mut judge = FormJudge::new(form(), "b");
        judge.take(b"--b\r\n").unwrap();
        for _ in 0..199 {
            judge.take(b"a").unwrap();
        }
        assert_eq!(judge.take(b"a"), Err(FormFault::Head.into()));
        assert!(judge.head.capacity() <= 512);
    }

    #[test]
    fn names_of_files() {
        let any = media::media_type("application/octet-stream").unwrap();
        let png = media::media_type("image/png").unwrap();
        let open = rule("a", true, "application/octet-stream");
        for good in ["a", "a.b", "Ж.tar.gz", "a (1).exe", "100%.x", "a'b", "a,b", "a=b", "#1 & more!.txt"] {
            assert!(is_file_name(good, &open, any), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".a",
            "a.",
            "a ",
            " a",
            "a/b",
            "a\\b",
            "a\0",
            "a\n",
            "a:b",
            "a;b",
            "a<b",
            "a>b",
            "a|b",
            "a*",
            "a?",
            "a\u{202e}b",
            "a\u{2215}b",
            "a\u{ff0f}b",
            "a\u{200b}",
            "a\u{85}b",
            "a\u{a0}",
        ] {
            assert!(!is_file_name(bad, &open, any), "{bad:?}");
        }
        assert!(is_file_name("a.PNG", &open, png) && !is_file_name("a.png.php", &open, png));
        assert!(is_file_name(&"a".repeat(255), &open, any) && !is_file_name(&"a".repeat(256), &open, any));
        let listed = PartRule { extensions: Some(vec!["md".to_owned()]), ..open };
        assert!(is_file_name("a.MD", &listed, any) && is_file_name("a", &listed, any));
        assert!(!is_file_name("a.txt", &listed, any));
    }

    #[test]
    fn percent_signs() {
        for (text, decoded) in
            [("a%20b", "a b"), ("100%", "100%"), ("%zz", "%zz"), ("%", "%"), ("%c3%A4", "ä"), ("%2", "%2")]
        {
            assert_eq!(percent_decoded(text).as_deref(), Some(decoded), "{text}");
        }
        assert_eq!(percent_decoded("%c0%af"), None);
    }

    fn cut<'a>(text: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut places: Vec<_> = cuts.iter().map(|cut| cut % (text.len() + 1)).collect();
        places.sort_unstable();
        places.push(text.len());
        let mut from = 0;
        places.into_iter().map(|to| &text[std::mem::replace(&mut from, to)..to]).collect()
    }

    /// Pieces that matter to a reader of forms.
    const WORDS: [&[u8]; 22] = [
        b"\r\n",
        b"\r",
        b"\n",
        b"-",
        b"--",
        b"--b",
        b"--b--",
        b"\r\n--b",
        b"\r\n--b\r\n",
        b"\r\n--b--\r\n",
        b"b",
        b"a",
        b"\xff",
        b"\0",
        b"\"",
        b";",
        b"Content-Disposition: form-data; name=\"note\"\r\n",
        b"Content-Type: text/plain\r\n",
        b"Content-Disposition: form-data; name=\"data\"\r\n\r\n",
        b"{}",
        b"\xc3",
        b"\xa4",
    ];

    proptest! {
        /// A delimiter is found wherever it is and nowhere else, however it is cut: against a search of the whole text.
        #[test]
        fn contents_end_where_the_delimiter_stands(
            boundary in select(&["b", "bb", "-b", "--", "b-b", "a-b-a", "bab"][..]),
            content in vec(select(&b"\r\n-ba"[..]), 0..40),
            cuts in vec(any::<usize>(), 0..8),
        ) {
            let bare = format!("--{boundary}");
            let text = [&content, b"\r\n".as_slice(), bare.as_bytes()].concat();
            let first = text.windows(bare.len()).position(|part| part == bare.as_bytes());
            let body = blob(boundary, content.len(), &content);
            let read = judged(boundary, cut(&body, &cuts));
            if first == Some(content.len() + 2) {
                // The declared length tells that the content was this one.
                prop_assert_eq!(read, Ok(1));
                let longer = blob(boundary, content.len() + 1, &content);
                prop_assert_eq!(judged(boundary, cut(&longer, &cuts)), Err(FormFault::Field.into()));
            } else {
                prop_assert!(read.is_err(), "{:?}", read);
            }
        }

        /// What is said of a form does not depend on how it is cut.
        #[test]
        fn pieces_are_judged_like_the_whole(
            words in vec(select(&WORDS[..]), 0..12),
            begins in any::<bool>(),
            cuts in vec(any::<usize>(), 0..10),
        ) {
            let begin: &[u8] = if begins { b"--b\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\n" } else { b"" };
            let body = [begin, &words.concat()].concat();
            let whole = judged("b", [body.as_slice()]);
            // Of several faults another one may be found first.
            prop_assert_eq!(whole.clone().ok(), judged("b", cut(&body, &cuts)).ok());
            prop_assert_eq!(whole.clone().ok(), judged("b", body.chunks(1)).ok());
            if let Ok(parts) = whole {
                // The boundary stands as often as there are delimiters, each a line of its own.
                let count = |needle: &[u8]| body.windows(needle.len()).filter(|part| *part == needle).count();
                prop_assert_eq!(count(b"--b"), parts as usize + 1);
                prop_assert_eq!(count(b"\r\n--b") + usize::from(body.starts_with(b"--b")), parts as usize + 1);
                prop_assert!(body.ends_with(b"--b--") || body.ends_with(b"--b--\r\n"));
            }
        }

        /// Text passes if it is UTF-8 without controls, however it is cut.
        #[test]
        fn text_is_judged_like_the_whole(text in vec(any::<u8>(), 0..12), cuts in vec(any::<usize>(), 0..6)) {
            let fits = str::from_utf8(&text)
                .is_ok_and(|text| !text.contains(|c: char| c.is_control() && !"\t\r\n".contains(c)));
            let mut check = Utf8::default();
            let judged = cut(&text, &cuts).into_iter().all(|piece| check.take(piece)) && check.is_whole();
            prop_assert_eq!(judged, fits);
        }

        /// A form of ours, whatever is in it, is read as it was written.
        #[test]
        fn honest_forms_pass(
            contents in vec((0..3_usize, "[ -~äж\t]{0,40}"), 0..4),
            cuts in vec(any::<usize>(), 0..6),
        ) {
            let mut body = Vec::new();
            for (kind, content) in &contents {
                let fields = ["note\"", "blob\"; filename=\"x.y\"\r\nContent-Type: application/octet-stream", "data\"\r\nContent-Type: application/json"];
                let content = if *kind == 2 { Value::from(content.as_str()).to_string() } else { content.clone() };
                prop_assume!(!content.contains("--b0undary"));
                body.extend(format!("--b0undary\r\nContent-Disposition: form-data; name=\"{}\r\n\r\n{content}\r\n", fields[*kind]).bytes());
            }
            body.extend(b"--b0undary--\r\n");
            let twice = (0..3).any(|kind| contents.iter().filter(|it| it.0 == kind).count() > 3);
            prop_assert_eq!(judged("b0undary", cut(&body, &cuts)).is_ok(), !twice);
        }
    }
}
