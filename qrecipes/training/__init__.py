"""The training loop's parts: step, task, optimizer, evaluation, checkpoints, metrics."""
