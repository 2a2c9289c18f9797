"""From raw preference rows to packed batches."""
