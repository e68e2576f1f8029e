from .library import ConceptLibrary as ConceptLibrary
from .library import Found as Found
from .library import Hit as Hit
from .pushing import Pushed as Pushed
from .pushing import push as push
