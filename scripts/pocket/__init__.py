"""Everything that makes pocket: the little world, its data sets, its tokenizer and its base models."""
