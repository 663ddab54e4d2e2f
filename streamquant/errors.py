"""What a user can see go wrong. Each message says what, where, what was needed and the way out, in one line."""

MAX_LINE = 1500


def one_line(text: str) -> str:
    """The text as it may be shown: what would break the line or steer a terminal is escaped, what would fill the screen cut."""
    line = text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"


def quoted(text: str) -> str:
    """The text in quotes that end where it ends, also in the shell of somebody who pastes the option that a message offers."""
    return "'" + text.replace("'", "'\\''") + "'"


class StreamquantError(Exception):
    """An expected failure, shown as one line. Any other exception is a bug of ours and keeps its traceback."""

    exit_code = 1

    def __init__(self, message: str):
        """Names in the message come from files of others."""
        super().__init__(one_line(message))


class RequestError(StreamquantError):
    """The wish cannot be met: wrong usage, or a scheme that the tensors do not allow."""

    exit_code = 2


class CheckpointError(StreamquantError):
    """The bytes of the source are wrong, or of a kind that is not supported."""

    exit_code = 3


class StorageError(StreamquantError):
    """The output cannot be written: no space, no permission."""

    exit_code = 4


class NetworkError(StreamquantError):
    """The source cannot be reached, or not for long enough."""

    exit_code = 5


class VerificationError(StreamquantError):
    """The finished output does not pass its own verification."""

    exit_code = 6
