"""The command line: one thin file for each command, over what the rest of quill does."""
