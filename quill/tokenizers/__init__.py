"""Text into token ids and back: one file a tokenizer, its file name the name it is registered under."""
