"""The `.pt` and `.pth` files of torch.save, and pickled vocabularies, read without running a pickle."""
