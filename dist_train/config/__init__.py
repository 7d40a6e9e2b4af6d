"""What a run is: sections, and how a value is decided. No torch here, so a configuration is checked in 0.2 s.

A value comes from, each overruling the one before: the defaults in the sections, the YAML file, `key.sub=value` on the
command line. There are no environment variables but those that say *where* a run happens (rank, master address).

    data, nets, conditioning, priors, losses, run     the sections: every setting, its default and the reason for it
    reading                                           from YAML and the command line to a run

Checks live in one place each: of a single field in the field, between fields of a section in its validator, between
sections in `RunConfig._check`, and what depends on the number of ranks in `plan_batch`. Derived values are properties;
nothing is written back.
"""

from dist_train.config.conditioning import ConditioningConfig, Grouping
from dist_train.config.data import DataConfig, DataSetConfig, MixupConfig, PatchChange, RainmixConfig
from dist_train.config.fields import host_and_port
from dist_train.config.losses import LossConfig, SgrConfig, SpdConfig
from dist_train.config.nets import (
    CustomConfig,
    EfficientDerainConfig,
    InitConfig,
    NafnetConfig,
    NetConfig,
    RcdnetConfig,
    SpfConfig,
    TeacherConfig,
    UformerConfig,
)
from dist_train.config.priors import (
    CachedConfig,
    LivePriorConfig,
    NoneConfig,
    PriorConfig,
    PspConfig,
    RegionsConfig,
    RemoteConfig,
    SamConfig,
    StoredConfig,
    VggConfig,
)
from dist_train.config.reading import dump_run, load_run, parse_run
from dist_train.config.run import (
    BatchPlan,
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrackConfig,
    changed_method,
    plan_batch,
)

__all__ = [
    "BatchPlan",
    "CachedConfig",
    "CheckpointConfig",
    "ConditioningConfig",
    "CustomConfig",
    "DataConfig",
    "DataSetConfig",
    "EfficientDerainConfig",
    "EngineConfig",
    "EvalConfig",
    "Grouping",
    "InitConfig",
    "LivePriorConfig",
    "LossConfig",
    "MixupConfig",
    "NafnetConfig",
    "NetConfig",
    "NoneConfig",
    "OptimConfig",
    "PatchChange",
    "PriorConfig",
    "PspConfig",
    "RainmixConfig",
    "RcdnetConfig",
    "RegionsConfig",
    "RemoteConfig",
    "RunConfig",
    "SamConfig",
    "SgrConfig",
    "SpdConfig",
    "SpfConfig",
    "StoredConfig",
    "TeacherConfig",
    "TrackConfig",
    "UformerConfig",
    "VggConfig",
    "changed_method",
    "dump_run",
    "host_and_port",
    "load_run",
    "parse_run",
    "plan_batch",
]
