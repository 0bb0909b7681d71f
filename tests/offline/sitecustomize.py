"""Put on PYTHONPATH: every attempt to connect or to look up a name is recorded and refused."""

import os
import socket
from pathlib import Path

_RECORD = Path(os.environ["BURNISH_NETWORK_RECORD"])


def _refuse(*args, **kwargs):
    with _RECORD.open("a") as file:
        file.write(f"{os.getpid()} {args}\n")
    raise OSError("the network is off in this test")


def _connect(self, address):
    if self.family == socket.AF_UNIX:
        return _real_connect(self, address)
    return _refuse(address)


_real_connect = socket.socket.connect
socket.socket.connect = _connect
socket.socket.connect_ex = _refuse
socket.socket.sendto = _refuse
for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getnameinfo"):
    setattr(socket, _name, _refuse)
