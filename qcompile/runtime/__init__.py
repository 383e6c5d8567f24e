"""From an operator's call to a kernel: which one for this device, shape and spec, and how it is launched."""
