"""The options of every gRPC channel that this package opens. Knows no gRPC."""

from typing import Final

from dspex_persist.infra.listen import ListenError, is_loopback

MESSAGE_BYTES: Final = 100 * 1024 * 1024
_SCHEMES: Final = ("dns:///", "ipv4:", "ipv6:")

Options = list[tuple[str, int]]


def channel_options(target: str, *, proxies: bool = True) -> Options:
    """Return the options for a channel to `target`.

    Args:
        target: A gRPC target.
        proxies: Use the proxy variables of the environment, if the target is on another machine. No proxy could reach
            the loopback addresses of this one.
    """
    return [
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.enable_http_proxy", int(proxies and not is_here(target))),
    ]


def is_here(target: str) -> bool:
    """Return whether a gRPC target is certainly on this machine."""
    for scheme in _SCHEMES:
        target = target.removeprefix(scheme)
    try:
        return target.startswith("unix") or is_loopback(target)
    except ListenError:
        return False
