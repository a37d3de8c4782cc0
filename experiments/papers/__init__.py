"""One module a paper: `build(config, workdir)` joins its algorithm to data and evaluation."""
