"""The offline store: sources, feature tables, as-of joins, training datasets."""
