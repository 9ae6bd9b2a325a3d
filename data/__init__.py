"""Which examples: records, sources, curation, expectations, the micro world. DVC keeps the data files beside them."""
