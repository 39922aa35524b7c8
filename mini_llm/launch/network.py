"""This machine's addresses and network interfaces (IPv4), and the one that leads to another."""

import contextlib
import ipaddress
import os
import socket

import psutil

from mini_llm.command_line import UsageError

# Of a network that exists on paper only (RFC 5737): the route to it is the default route.
SOMEWHERE = "203.0.113.1"


def host_name() -> str:
    """This machine's name, as ranks report it."""
    return os.uname().nodename


def own_addresses() -> dict[str, str]:
    """Address -> name of the interface that has it."""
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }


def resolve(host: str) -> str:
    """The address of a host name; OSError if nobody knows it."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except UnicodeError as error:  # two dots in a row, or more than 63 letters between two
        raise OSError("no host has such a name") from error
    return str(found[0][4][0])


def check_is_this_machine(main_ip: str) -> None:
    """Raise UsageError unless connections to ``main_ip`` end here."""
    try:
        address = resolve(main_ip)
    except OSError as error:
        raise _unreachable(main_ip, error) from None
    if not ipaddress.ip_address(address).is_loopback and address not in own_addresses():
        raise UsageError(
            f"--main_ip {main_ip} is not an address of this machine, which is node 0; it has "
            f"{', '.join(sorted(own_addresses()))}"
        )


def _unreachable(main_ip: str, error: OSError) -> UsageError:
    return UsageError(
        f"--main_ip {main_ip} cannot be reached from this machine ({error.strerror or error}); "
        "give an address of node 0 on a network that all nodes share"
    )


def address_towards(address: str) -> str:
    """The own address that packets to ``address`` would carry; OSError without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: looks the route up and sends nothing
        return str(probe.getsockname()[0])


def interface_towards(main_ip: str) -> str:
    """The interface through which this machine reaches the first node. Raises UsageError."""
    try:
        address = resolve(main_ip)
        own = address_towards(address)
    except OSError as error:
        raise _unreachable(main_ip, error) from None
    if ipaddress.ip_address(own).is_loopback and main_ip not in (address, "localhost"):
        # The name of this very machine, which its hosts file gives to the loopback interface.
        own = own_address(None)
    return own_addresses()[own]


def own_address(interface: str | None) -> str:
    """The address under which other nodes reach this machine: of ``interface``, if that is given.

    Else of the interface with the default route or, without one, of the only one that is up. Raises
    UsageError where that is not one.
    """
    by_interface = {name: address for address, name in own_addresses().items()}
    if interface is not None:
        if interface not in by_interface:
            raise UsageError(
                f"--network_interface or GLOO_SOCKET_IFNAME {interface} does not exist here or has "
                f"no IPv4 address; this machine has {', '.join(sorted(by_interface))}"
            )
        return by_interface[interface]
    with contextlib.suppress(OSError):
        return address_towards(SOMEWHERE)
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    candidates = {
        name: address
        for name, address in by_interface.items()
        if name in up and not ipaddress.ip_address(address).is_loopback
    }
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    found = ", ".join(f"{name} ({address})" for name, address in sorted(candidates.items()))
    raise UsageError(
        f"this machine has no default route and several network interfaces or none: "
        f"{found or 'none'}; name the one that leads to the other nodes: --network_interface NAME"
    )


def check_port_is_free(port: int) -> None:
    """Raise UsageError if another process of this machine listens on ``port``."""
    with socket.socket() as probe:
        # What is left of closed connections does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"--main_port {port} cannot be used on this machine ({error.strerror}); give all "
                "nodes another --main_port"
            ) from None
