"""How a model turns a prompt into the next token: every intermediate result, and a page that shows it."""
