"""Objects in S3 and their transfer in parts."""
