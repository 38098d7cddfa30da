//! The fuzz targets over their committed corpora: what was once found stays found.

use std::fs;
use std::path::Path;

use sealgate_tests::fuzz::TARGETS;

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
