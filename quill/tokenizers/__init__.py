"""Text to token ids and back: one file per tokenizer, registered under the file's name."""
