"""Packed layers: `run` is the one door, `definition` says what each op is; the rest makes it fast."""
