"""Visibility of the page, and what Gradio is kept from sharing by variables of the environment."""

import ipaddress
import os


def environment(folder: str) -> None:
    """Set Gradio's variables in the environment: its folder of files, and no records; others open paths and tunnels."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Records of who called what and when, and their summary after each call.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**31)


def is_loopback(host: str) -> bool:
    """True for addresses that no other machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def lines(host: str, url: str, loras: list[str]) -> list[str]:
    """Lines on who can see the page, and what it gives them."""
    named = f", its LoRAs ({', '.join(loras)})" if loras else ""
    gives = f"draws with the model{named} and shows the command line of each image, with the paths of its weights"
    if is_loopback(host):
        return [f"the page at {url} is for this machine alone; it {gives}. No file is read but those uploaded. "
                "Ctrl-C ends it"]  # fmt: skip
    return [
        f"the page at {url} {gives}. No file is read but those uploaded. Ctrl-C ends it",
        f"warning: --host {host} lets every machine that reaches this one use the page, without a password and "
        f"unencrypted; leave --host out for this machine alone",
    ]
