"""One check a file; `metagrad_filter.metagradient.checks` says which answers what."""
