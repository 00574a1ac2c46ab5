"""`python -m client`."""

import gc
import signal
import threading

# Ctrl-C while the packages are imported ends the process as it ends any other, without a traceback.
_STARTING = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _STARTING:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# What is imported stays: looking for garbage in it, now and at the end, takes a third of a short command.
gc.disable()
from .cli import main  # noqa: E402

gc.freeze()
gc.enable()

if _STARTING:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    main()
