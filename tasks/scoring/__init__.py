"""Examples to images to scores, for the stages that judge."""
