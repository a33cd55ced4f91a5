"""The method catalogue: one file per published method, all behind the contract in contract.py."""
