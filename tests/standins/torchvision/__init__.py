"""What timm imports of torchvision, of which no build exists for every torch that is tested here.

timm's models need one layer of it, ``FrozenBatchNorm2d``, which is here and computes what torchvision's does. Its
package also imports names of data sets and image transforms, which no test calls. ``with_timm.py`` shows this package
to timm alone, so that no other library takes torchvision for installed.
"""
