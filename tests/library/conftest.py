"""The cluster of tests that need one."""

from tests.support.shards import cluster as cluster
