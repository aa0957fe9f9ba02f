"""The initialisations that PEFT makes by itself."""

from __future__ import annotations

from fedpeft.adapters.kinds.kind import Init

DEFAULT = Init(name="default", value=True)
GAUSSIAN = Init(name="gaussian", value="gaussian")
PISSA = Init(name="pissa", value="pissa", of_base=True)
OLORA = Init(name="olora", value="olora", of_base=True, conv1d=False)  # PEFT decomposes the transposed weight
