"""What ``train_imagenet.py`` is made of: arguments, processes, data, model, training step, run and its files."""
