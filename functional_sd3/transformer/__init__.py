"""The velocity network (MMDiT), ControlNets and IP-Adapters."""
