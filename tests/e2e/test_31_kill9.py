#!/usr/bin/env python3
"""A few rounds of each kind of long_31_kill9.py; that one runs as many as you have time for."""

import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import long_31_kill9 as long  # noqa: E402
import repfs_e2e as e2e  # noqa: E402

ROUNDS = 4


def test_secondary():
    long.run("secondary", ROUNDS, random.randrange(1 << 31))


def test_primary():
    long.run("primary", ROUNDS, random.randrange(1 << 31))


def test_failover():
    long.run("failover", ROUNDS, random.randrange(1 << 31))


def test_latest():
    long.run("latest", ROUNDS, random.randrange(1 << 31))


def test_commit():
    long.run("commit", ROUNDS, random.randrange(1 << 31))


if __name__ == "__main__":
    e2e.main(limit=300)
