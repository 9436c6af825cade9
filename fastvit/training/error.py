"""What a run says when it cannot go on."""


class TrainingError(RuntimeError):
    """A run that cannot start, go on, be saved or be resumed; one line that says why and what is left."""
