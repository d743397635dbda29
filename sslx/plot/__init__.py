"""Pictures: a map of the features, the loss over the steps of a run, and sheets of images."""

from sslx.plot.canvas import MARKERS as MARKERS
from sslx.plot.canvas import OPACITY as OPACITY
from sslx.plot.canvas import PALETTE as PALETTE
from sslx.plot.confusion import confusion_matrix as confusion_matrix
from sslx.plot.embedding import MAX_NAMED_CLASSES as MAX_NAMED_CLASSES
from sslx.plot.embedding import feature_map as feature_map
from sslx.plot.embedding import projections as projections
from sslx.plot.embedding import subsample as subsample
from sslx.plot.loss import epoch_marks as epoch_marks
from sslx.plot.loss import loss_curve as loss_curve
from sslx.plot.sheets import Row as Row
from sslx.plot.sheets import drawn_channels as drawn_channels
from sslx.plot.sheets import images as images
from sslx.plot.sheets import neighbor_sheet as neighbor_sheet
from sslx.plot.sheets import neighbors as neighbors
from sslx.plot.sheets import rgb as rgb
from sslx.plot.sheets import sections as sections
from sslx.plot.sheets import side_by_side as side_by_side
