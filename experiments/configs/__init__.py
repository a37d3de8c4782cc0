"""One module a paper: `PRESETS` says what each preset is, `get_config(preset)` returns it."""
