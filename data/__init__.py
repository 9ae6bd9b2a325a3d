"""Which examples: records, curation, expectations, the micro world. The data files themselves lie beside, tracked by
DVC.
"""
