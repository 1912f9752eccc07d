"""The cluster of these tests."""

from tests.support.shards import cluster as cluster
