"""Which examples are kept, and why the others are not: filters, duplicates, expectations."""
