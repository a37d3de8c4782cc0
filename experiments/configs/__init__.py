"""The presets of one paper or study per file: `PRESETS` lists them, `get_config` returns one."""
