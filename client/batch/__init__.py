"""Many slides: manifest, worker pools, records, tables."""
