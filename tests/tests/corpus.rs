//! The fuzz targets over their committed corpora: what was once found stays found.

use std::fs;
use std::path::Path;

use sealgate_tests::fuzz::{TARGETS, Target, certificate_choice, client_hello, request_guard};

#[test]
fn a2_every_fuzz_target_holds_over_its_corpus() {
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut count = 0;
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("an entry").path();
            let bytes = fs::read(&path).expect("a file");
            let held = std::panic::catch_unwind(|| target(&bytes));
            assert!(held.is_ok(), "{name} does not hold over {}", path.display());
            // And over every beginning of it: peers stop anywhere.
            for end in 0..bytes.len().min(256) {
                let held = std::panic::catch_unwind(|| target(&bytes[..end]));
                assert!(
                    held.is_ok(),
                    "{name} does not hold over the first {end} bytes of {}",
                    path.display()
                );
            }
            count += 1;
        }
        assert!(count >= 5, "{name} has a corpus of {count}");
    }
}

/// What the guard passes, hyper reads the same way: over the corpus, cut, joined and changed at random.
#[test]
fn a2_the_guard_and_hyper_read_the_same_requests() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/request_guard");
    let mut files: Vec<_> =
        fs::read_dir(&folder).expect("a corpus").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|path| fs::read(path).expect("a file")).collect();
    const PIECES: [&[u8]; 14] = [
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"\0",
        b"GET / HTTP/1.1\r\n",
        b"\xff",
    ];
    let mut random = fastrand::Rng::with_seed(9112);
    for _ in 0..4000 {
        let mut wire = Vec::new();
        for _ in 0..random.usize(1..4) {
            wire.extend_from_slice(&corpus[random.usize(..corpus.len())]);
        }
        for _ in 0..random.usize(0..4) {
            let at = random.usize(..wire.len());
            match random.u8(..4) {
                0 => wire[at] ^= 1 << random.u8(..8),
                1 => drop(wire.drain(at..(at + random.usize(1..8)).min(wire.len()))),
                2 => drop(wire.splice(at..at, PIECES[random.usize(..PIECES.len())].iter().copied())),
                _ => wire.truncate(at + 1),
            }
            if wire.is_empty() {
                break;
            }
        }
        let held = std::panic::catch_unwind(|| request_guard(&wire));
        assert!(held.is_ok(), "{:?}", String::from_utf8_lossy(&wire));
    }
}

/// What clients say first, changed at random, is read as it should be, or refused.
#[test]
fn a2_what_clients_say_first_may_be_changed_at_random() {
    let corpus = |name: &str| -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut files: Vec<_> =
            fs::read_dir(&folder).expect("a corpus").map(|entry| entry.expect("an entry").path()).collect();
        files.sort();
        files.iter().map(|path| fs::read(path).expect("a file")).collect()
    };
    let mut random = fastrand::Rng::with_seed(8446);
    let targets: [Target; 2] = [("client_hello", client_hello), ("certificate_choice", certificate_choice)];
    for (name, target) in targets {
        let corpus = corpus(name);
        for _ in 0..3000 {
            let mut wire = corpus[random.usize(..corpus.len())].clone();
            for _ in 0..random.usize(1..5) {
                if wire.is_empty() {
                    break;
                }
                let at = random.usize(..wire.len());
                match random.u8(..4) {
                    0 => wire[at] ^= 1 << random.u8(..8),
                    1 => wire[at] = random.u8(..),
                    2 => drop(wire.drain(at..(at + random.usize(1..8)).min(wire.len()))),
                    _ => wire.insert(at, random.u8(..)),
                }
            }
            let held = std::panic::catch_unwind(|| target(&wire));
            assert!(held.is_ok(), "{name}: {wire:02x?}");
        }
    }
}
