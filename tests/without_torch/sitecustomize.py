"""Hides torch from the processes that tests start.

transformers imports it where it is installed, which takes each process a second. The product never needs it.
"""

import sys

sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # as importlib has it for a module that is not there
