#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sealgate_tests::fuzz::proxy_header(data));
