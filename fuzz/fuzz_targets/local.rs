#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| migshm_tests::decoders::run("local", bytes));
