"""Parts of the trainer: the training process and the folders of versions."""
