from .pushing import Pushed as Pushed
from .pushing import push as push
from .search import ConceptLibrary as ConceptLibrary
from .search import Found as Found
from .search import Hit as Hit
