"""What both recipes share: arguments, optimizer, checkpoints, evaluation, metrics."""
