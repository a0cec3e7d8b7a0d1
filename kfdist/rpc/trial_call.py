"""`python -m kfdist.rpc.trial_call ADDRESS CERTIFICATES TOKEN_FILE`: whether a controller refuses a client's token.

A process of its own, because ranks never load gRPC. It exits with `REFUSED` if so, with 0 if the controller takes the
token or can't be asked; its certificates are `kfdist.rpc.handshake`'s to explain.
"""

import sys

import grpc

from kfdist.rpc.channels import open_channel
from kfdist.rpc.status import code_of
from kfdist.system.credentials import Credentials, Role

SECONDS = 5.0
REFUSED = 3


def main() -> None:
    """Calls the controller once."""
    address, certificates, token_file = sys.argv[1:]
    credentials = Credentials(role=Role.CLIENT, certificates=certificates, token_file=token_file)
    with open_channel(address, credentials) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            if code_of(error) is grpc.StatusCode.UNAUTHENTICATED:
                sys.exit(REFUSED)


if __name__ == "__main__":
    main()
