"""The name under which the project began: everything here is `tensafe_client`."""

from tensafe_client import *  # noqa: F403
from tensafe_client import __all__ as __all__
