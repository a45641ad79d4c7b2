"""Lightning callbacks: averaging of weights, evaluation, checkpoints, logging."""
