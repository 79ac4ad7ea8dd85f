"""Which replicas of a mesh over several processes are whose: those of a group of processes have one schedule."""

from collections.abc import Sequence


def own_group(places: Sequence[frozenset[int]], process: int) -> tuple[list[int], int, int]:
    """(the replicas of this process's group, the number of the group, how many groups there are).

    A group is the processes of one replica, or one process with its replicas.

    places: the processes that each replica has devices of.

    Raises:
      ValueError: a process has parts of several replicas, processes differ in how many replicas they have, or this one
        has none.
    """
    groups = sorted(set(places), key=min)  # the first has the first process, which writes
    if not any(process in group for group in groups):
        raise ValueError(
            f"process {process} has no device of the mesh, which has those of processes "
            f"{_words(frozenset().union(*groups))}: start fewer processes, or use all devices"
        )
    for i, one in enumerate(places):
        for k in range(i):
            if one & places[k] and (one != places[k] or len(one) > 1):
                raise ValueError(
                    f"replica {k} of the axis 'data' is on processes {_words(places[k])}, and replica {i} on "
                    f"{_words(one)}: a process can have whole replicas, or a part of one; name the axis 'data' first, "
                    "and start as many processes as there are replicas, a divisor or a multiple"
                )
        if (count := places.count(one)) != (first := places.count(places[0])):
            raise ValueError(
                f"process {_words(places[0])} has {first} of the {len(places)} replicas of the axis 'data', and "
                f"{_words(one)} has {count}: give all as many"
            )
    own = next(i for i, group in enumerate(groups) if process in group)
    return [i for i, place in enumerate(places) if place == groups[own]], own, len(groups)


def _words(processes: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(processes)))
