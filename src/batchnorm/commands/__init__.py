"""What the commands for whole models need beside the models: named objects, checkpoint files, errors in one line."""
