"""One HTML page about runs: `runs` reads records and restores pictures, `curves` draws, `page` writes it all down."""
